"""Side-by-side measurements: contestants interleaved in one launch, ratios per round, memory in a run of its own."""
