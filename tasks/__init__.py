"""Example workflows: an order (`tasks.orders`) and an import (`tasks.imports`)."""
