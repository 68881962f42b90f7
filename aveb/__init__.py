"""The paper's benchmark: data sets, metrics, the judge, answering, tables."""
