"""One runnable claim a paper: `claims/ROOM/ID.py`."""
