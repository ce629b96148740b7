"""M: statistics, ranks, and low-rank weights in closed form."""
