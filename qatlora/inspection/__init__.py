"""Is a checkpoint on the Q4_0 grid, tensor by tensor, and what did an edit do to it?"""
