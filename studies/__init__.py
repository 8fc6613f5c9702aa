"""Studies in small: the losses of the paper's Table 6, on data sets for two CPU cores. Command: python -m studies."""
