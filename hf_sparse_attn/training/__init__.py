"""Distillation and the joint LoRA stage."""
