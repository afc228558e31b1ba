"""`python -m lorica`, which is how torchrun starts it: torchrun --nproc-per-node 2 -m lorica train ..."""

from lorica.cli import main

if __name__ == "__main__":
    main()
