"""The paper's ablations in miniature, figures and speed.  Nothing else depends on it."""
