"""``python -m benthic``, which is what torchrun starts."""

from benthic.cli import main

if __name__ == "__main__":
    main()
