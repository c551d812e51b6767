"""Print the table of supported families: `python -m hybrid.families`."""

from hybrid.families.table import table

if __name__ == "__main__":
    print(table(), end="")
