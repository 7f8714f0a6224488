module dho.test/pause

go 1.26.0
