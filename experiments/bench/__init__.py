"""Speed and memory beside the baselines' and the machine's own limits."""
