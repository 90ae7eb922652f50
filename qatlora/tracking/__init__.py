"""Where a run is followed besides its own folder: Weights & Biases, TensorBoard, or nowhere.

The run's own JSONL log and report are always written; a tracker gets the same figures. Nothing here
may stop a run: what a service does not take is said in one line.
"""

from qatlora.tracking.trackers import NoTracker, Tracker, open_tracker, require_tracker

__all__ = ["NoTracker", "Tracker", "open_tracker", "require_tracker"]
