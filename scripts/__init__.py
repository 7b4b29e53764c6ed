"""The command line: one module per subcommand, a configuration and a few calls each."""
