# What paper.sh and ablations.sh share: parts that are done once, in order, until one fails. To be sourced.

say() { [ -n "${LIST:-}" ] || echo "== $*"; }

wanted() { # wanted NAME: does one of the command line's names begin it? Without names every part is wanted
    local name
    for name in "${WANTED[@]:-}"; do
        [[ $1 != "$name"* ]] || return 0
    done
    return 1
}

# run FOLDER NEED... -- COMMAND...: COMMAND --out FOLDER, if FOLDER's name is wanted, there is no FOLDER/done yet, and
# every NEED is there; what is left out is said
run() {
    local folder=$1
    shift
    [ -z "${LIST:-}" ] || { echo "${folder##*/}"; return; }
    wanted "${folder##*/}" || return 0
    if [ -e "$folder/done" ]; then
        say "$folder: done before"
        return
    fi
    while [ "$1" != -- ]; do
        [ -e "$1" ] || { say "$folder: left out, no $1"; return; }
        shift
    done
    say "$folder"
    "${@:2}" --out "$folder"
    touch "$folder/done"
}

# all PARTS: the function PARTS, which calls `run`; before anything is run a name of no part is refused
all() {
    local names name
    names=$(LIST=yes "$1")
    for name in "${WANTED[@]:-}"; do
        [[ $'\n'$names == *$'\n'"$name"* ]] ||
            { echo "${0##*/}: no part begins with $name; there are" $names >&2; exit 2; }
    done
    "$1"
}
