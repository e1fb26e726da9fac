"""Distillation and pre-training: configuration, conditions, data, loss and loops."""
