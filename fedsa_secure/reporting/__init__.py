"""What people look at after a run or a measurement. Reads results and changes none.

audit        the figure of what audits prove
rows         one row per figure, as JSON
similarity   the figure of how alike the clients' A and B are
"""
