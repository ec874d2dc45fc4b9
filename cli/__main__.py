"""`python -m kvrelay.cli`: the same as the console command, for processes that `kvrelay up` starts."""

from kvrelay.cli.main import main

if __name__ == "__main__":
    main()
