"""Measurements of `ssmvl bench`, as shares of the machine's own limits in the same run."""
