"""``python -m stabmon.cli``, for where the script ``stabmon`` is not on the path."""

from stabmon.cli import main

if __name__ == "__main__":
    main()
