"""Model families: each builds a module and the data that tuners and engines need of it."""
