"""Methods of federated fine-tuning, as rows of data."""

from fedsa_secure.methods.catalog import METHODS, find_method, methods_table
from fedsa_secure.methods.method import Method

__all__ = ["METHODS", "Method", "find_method", "methods_table"]
