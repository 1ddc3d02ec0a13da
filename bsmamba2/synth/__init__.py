"""The song synthesiser."""
