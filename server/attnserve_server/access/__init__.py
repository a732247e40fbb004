"""Who may do what: tokens with scopes and quotas, certificates, their reload, and back-off on guessing. No protocol."""
