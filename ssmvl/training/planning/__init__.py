"""Memory and time of a run, estimated on `meta`; imports no Composer."""
