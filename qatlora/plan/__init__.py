"""How much memory a run needs, from the architecture alone; used by recipe=plan and preflight."""
