"""``python -m hf_sparse_attn.cli``."""

from . import main

if __name__ == "__main__":
    main()
