"""The service: a bundle is opened, checked and answers over HTTP."""
