"""What a person looks at outside of a terminal: contact sheets, and the pages of a search and of an audit."""
