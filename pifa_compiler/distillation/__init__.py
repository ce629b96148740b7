"""Training the factors of a compressed model until it predicts what the dense model predicts (Hinton et al., 2015)."""
