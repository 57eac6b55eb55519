"""The operators in torch alone: bounded memory, any torch device."""
