"""Decoding: sampling, the loop of steps on the device, and prompts in, completions out."""
