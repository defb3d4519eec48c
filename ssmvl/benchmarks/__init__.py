"""What `ssmvl bench` measures, always as a share of what the machine itself allows in the same run."""
