"""`mlcgen bench`: artifacts and other engines, side by side on this machine. Each runs in a process of its own."""
