"""Passes: graph in, graph out, one per file; each reads facts, rewrites nodes and says how many.

Passes write calls of the ops of `kernels` and build what these look up; they know no run time.
Each takes a `torch.fx.GraphModule` that `graph_edit.copy_graph` made (never Dynamo's own), and
leaves it linted and recompiled.
"""
