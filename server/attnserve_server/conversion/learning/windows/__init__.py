"""What a windowed site's windows are of its sequences: which query each row is, and which key each column.

Told by running the graph on the numbers of the positions (`build.learning.provenance`), and put into closed form
(`build.learning.bands`).
"""

from attnserve_server.conversion.learning.windows.apart import windows_apart
from attnserve_server.conversion.learning.windows.check import band_error
from attnserve_server.conversion.learning.windows.settle import grid_of_windows, windows_of, with_key_axes

__all__ = ["band_error", "grid_of_windows", "windows_apart", "windows_of", "with_key_axes"]
