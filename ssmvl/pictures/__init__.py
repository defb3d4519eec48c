"""The room of drawings: plain data in, text or PNG files out; it knows no model."""
