"""What people look at after a run. Reads results of ``federation`` and changes none.

similarity   the figure of how alike the clients' A and B are
"""
