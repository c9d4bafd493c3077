"""`python -m lit_vapo` is `lit-vapo`."""

from lit_vapo.cli import main

if __name__ == "__main__":
    main()
