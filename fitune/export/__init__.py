"""What leaves: adapters read, merged models written for whatever serves them."""
