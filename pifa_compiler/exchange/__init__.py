"""What of a model may be exchanged for something that computes the same, and how that is done whole."""
