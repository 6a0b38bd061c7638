"""Sample apps are loaded by the tests that use them, never by pytest looking for doctests."""

collect_ignore_glob = ["*.py"]
