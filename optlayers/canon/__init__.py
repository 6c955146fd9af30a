"""From a modelling language to a framework-free `Program`: no torch and no jax in here."""
