"""The extra prediction heads."""
