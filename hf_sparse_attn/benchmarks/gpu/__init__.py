"""What a GPU should tell in one short session: ``recipes/gpu/run.sh`` runs the stages here, one process each.

Every stage writes one JSON file anew after each row, so that a kill loses nothing, and ends by itself. A row that fails
says so, and the next one runs. With ``--dry`` all of it runs with tiny sizes on a CPU, the Triton kernels in their
interpreter.
"""
