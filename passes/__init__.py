"""Graph passes: each takes an FX graph and rewrites one pattern in it."""
