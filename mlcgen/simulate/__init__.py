"""`mlcgen simulate`: the engine's scheduler and page pool against measured step times, on requests that are made up."""
