"""Helpers on top of torch: process group, per-sample random numbers, checkpoints, devices."""
