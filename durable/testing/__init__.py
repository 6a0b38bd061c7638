"""For the tests of what is built on this package; nothing here runs in production."""
