"""AVEB in miniature: a generated benchmark, the pretraining of its tiny parts, their weights."""
