"""One round, arrow by arrow: ``train → encode → sum → decode → update``.

local_training   a client's steps on its own rows, many clients in one pass
encoding         the update of the shared tensors as one flat vector, and back
aggregation      the sum of the vectors
server           the public shared tensors and how a round changes them
evaluation       personal models on their own and on the common test rows
history          one record per round
similarity       how alike the clients' A and B are
checkpoint       client and server state on disk, crash-safe
run              a run folder, opened
"""
