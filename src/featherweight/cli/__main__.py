"""`python -m featherweight.cli`."""

from __future__ import annotations

from featherweight.cli import main

if __name__ == "__main__":
    main()
