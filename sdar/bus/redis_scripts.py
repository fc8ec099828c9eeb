"""The Lua scripts that Redis runs for the bus, each of them alone and whole.

Redis checks for memory at a script's first write that needs some. Each script therefore checks
everything before it writes, and writes first what needs memory: it is applied whole or not at all,
also by a Redis that is full. All run on Redis 6.2.

Arguments are read in order by `take`, for a commit may have thousands; keys are named by their
index in KEYS.
"""

from __future__ import annotations

_TAKE = """
local cursor = 0
local function take()
    cursor = cursor + 1
    return ARGV[cursor]
end
local function take_number()
    return tonumber(take())
end
"""

# Part of each script that a process with a role runs. A tenure is the time when the role was
# claimed, or one more than the last: no two are the same, also when Redis lost its disk in between,
# and with it the last one.
_ROLES = """
for _ = 1, take_number() do
    local key, role, tenure = KEYS[take_number()], take(), take()
    local current = redis.call('GET', key)
    if not current then return {'emptied', role} end
    if current ~= tenure then return {'superseded', role} end
end
"""

# %.0f: Lua would write so large a number with an exponent, and tenures are compared as text.
CLAIM_ROLE = """
local time = redis.call('TIME')
local last = tonumber(redis.call('GET', KEYS[1]) or '0')
local tenure = math.max(last + 1, time[1] * 1000000 + time[2])
redis.call('SET', KEYS[1], string.format('%.0f', tenure))
return tenure
"""

COMMIT = f"""
{_TAKE}
local MARK, STATES, LETTERS = KEYS[1], KEYS[2], KEYS[3]
local LEDGER, OPEN, JOURNAL = KEYS[4], KEYS[5], KEYS[6]
local FIRST_CLOSED, LAST_CLOSED = 7, 11
local CLOSED = {{
    trained = KEYS[7],
    skipped = KEYS[8],
    stale = KEYS[9],
    failed = KEYS[10],
    cancelled = KEYS[11],
}}

local measured = {{}}
for index = 1, take_number() do measured[index] = KEYS[take_number()] end
local function finish()
    local reply = {{'done'}}
    for index, key in ipairs(measured) do reply[index + 1] = redis.call('XLEN', key) end
    return reply
end

-- Its reply was lost, and it comes again.
local mark_ms = take()
if redis.call('EXISTS', MARK) == 1 then return finish() end
{_ROLES}
local has_effects, held = take() == '1', {{}}
for index = 1, take_number() do
    local key, group, consumer = KEYS[take_number()], take(), take()
    local id, num_deliveries = take(), take_number()
    -- pcall: a group that is gone holds nothing.
    local row = redis.pcall('XPENDING', key, group, id, id, 1, consumer)[1]
    if row and row[4] == num_deliveries then
        held[#held + 1] = {{key, group, id}}
    elseif has_effects then
        return {{'lost', index - 1}}
    end
end
local retired = {{}}
for index = 1, take_number() do
    retired[index] = take()
    local letter = redis.call('XRANGE', LETTERS, retired[index], retired[index])
    if #letter == 0 then return {{'gone', retired[index]}} end
end

-- Everything is checked. From here on nothing fails but this first write.
if has_effects then redis.call('SET', MARK, '', 'PX', mark_ms) end
for _ = 1, take_number() do
    local key, bound, num_payloads = KEYS[take_number()], take(), take_number()
    for _ = 1, num_payloads do
        if bound == '' then
            redis.call('XADD', key, '*', 'p', take())
        else
            redis.call('XADD', key, 'MAXLEN', bound, '*', 'p', take())
        end
    end
end
for _ = 1, take_number() do redis.call('HSET', STATES, take(), take()) end

-- The same rules as `LedgerAccount.apply`. Returns whether the transition belongs into the journal.
local function book(number, outcome)
    if number == '' then return true end
    local standing = redis.call('HGET', OPEN, number)
    if outcome == 'issued' then
        if standing then return false end
        for index = FIRST_CLOSED, LAST_CLOSED do
            if redis.call('GETBIT', KEYS[index], number) == 1 then return false end
        end
        redis.call('HSET', OPEN, number, 'r')
        redis.call('HINCRBY', LEDGER, 'issued', 1)
        return false
    end
    if not standing or (standing == 'b' and outcome == 'generated') then return false end
    if standing == 'r' then redis.call('HINCRBY', LEDGER, 'generated', 1) end
    if outcome == 'generated' then
        redis.call('HSET', OPEN, number, 'b')
    else
        redis.call('HDEL', OPEN, number)
        redis.call('SETBIT', CLOSED[outcome], number, 1)
        redis.call('HINCRBY', LEDGER, outcome, 1)
    end
    return true
end
for _ = 1, take_number() do
    local number, outcome, payload = take(), take(), take()
    if book(number, outcome) then redis.call('XADD', JOURNAL, '*', 'p', payload) end
end

for _ = 1, take_number() do
    local bound, fields = take(), {{}}
    for index = 1, take_number() do fields[index] = take() end
    redis.call('XADD', LETTERS, 'MAXLEN', bound, '*', unpack(fields))
end
for _, entry in ipairs(held) do redis.call('XACK', entry[1], entry[2], entry[3]) end
for _, id in ipairs(retired) do redis.call('XDEL', LETTERS, id) end
return finish()
"""
"""Arguments: streams to measure; the mark's life; roles; whether it has effects; acknowledgements;
retired letters; publications; states; transitions; dead letters. Replies `done` and the lengths, or
why it was refused."""

RECLAIM = f"""
{_TAKE}
{_ROLES}
local stream, group, consumer, min_idle_ms = KEYS[1], take(), take(), take()
local taken = {{}}
for _ = 1, take_number() do
    local id, num_deliveries = take(), take_number()
    local row, entry = redis.pcall('XPENDING', stream, group, id, id, 1)[1], nil
    if row and row[4] == num_deliveries then
        entry = redis.call('XCLAIM', stream, group, consumer, min_idle_ms, id)[1]
    elseif row and row[4] == num_deliveries + 1 and row[2] == consumer then
        -- Claimed by this very call, whose reply was lost.
        entry = redis.call('XRANGE', stream, id, id)[1]
    end
    if entry then taken[#taken + 1] = {{id, entry[2][2], num_deliveries + 1}} end
end
return {{'done', unpack(taken)}}
"""
"""Takes over entries that are pending as the caller saw them, a page at most. Of two that try, one
gets an entry.
"""

READ_IN_ROLE = f"""
{_TAKE}
{_ROLES}
local stream, group, consumer, max_count = KEYS[1], take(), take(), take()
local reply = redis.pcall(
    'XREADGROUP', 'GROUP', group, consumer, 'COUNT', max_count, 'STREAMS', stream, '>'
)
if reply and reply.err then return reply end
if reply then return {{'done', reply[1][2]}} end
for _, info in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
    if info[2] == group then return {{'done', {{}}, info[8]}} end
end
"""
"""New entries for the holder of a role. If there are none, the reply has the id of the last one
that the consumer group was given.
"""

LIST_UNSEEN = f"""
{_TAKE}
local stream, group, consumer, after_id, max_count = KEYS[1], take(), take(), take(), take_number()
local unseen, page_size = {{}}, 256
while true do
    local rows = redis.pcall('XPENDING', stream, group, '(' .. after_id, '+', page_size, consumer)
    for _, row in ipairs(rows) do
        local entry = row[4] == 1 and redis.call('XRANGE', stream, row[1], row[1])[1]
        if entry then unseen[#unseen + 1] = entry end
        if #unseen == max_count then return unseen end
    end
    if #rows < page_size then return unseen end
    after_id = rows[page_size][1]
end
"""
"""Entries read once by this consumer after an id: those of a read whose reply was lost. Others may
stand between them, taken over from somebody else."""

RENEW = f"""
{_TAKE}
local stream, group, consumer, idle_ms, held = KEYS[1], take(), take(), take(), {{}}
for index = 1, take_number() do
    local id, num_deliveries = take(), take_number()
    local row = redis.pcall('XPENDING', stream, group, id, id, 1, consumer)[1]
    if row and row[4] == num_deliveries then
        -- JUSTID leaves the delivery count alone: renewing is not another attempt.
        redis.call('XCLAIM', stream, group, consumer, 0, id, 'IDLE', idle_ms, 'JUSTID')
        held[#held + 1] = index - 1
    end
end
return held
"""
"""Sets the idle time of the entries that are still held as the caller describes them: 0 renews
them, a long one hands them back. Replies with their indices.
"""

FORGET_CONSUMERS = """
local stream, min_idle_ms = KEYS[1], tonumber(ARGV[1])
local groups = redis.pcall('XINFO', 'GROUPS', stream)
if groups.err then return end
for _, group in ipairs(groups) do
    for _, consumer in ipairs(redis.call('XINFO', 'CONSUMERS', stream, group[2])) do
        if consumer[4] == 0 and consumer[6] >= min_idle_ms then
            redis.call('XGROUP', 'DELCONSUMER', stream, group[2], consumer[2])
        end
    end
end
"""
"""Forgets consumers that hold nothing and have been silent. One that was alive all the same is made
again by its next read.
"""

# The check and the writes are one script: of two processes that restore, one does.
RESTORE = f"""
{_TAKE}
{_ROLES}
local LEDGER, STATES = KEYS[1], KEYS[2]
if tonumber(redis.call('HGET', LEDGER, 'issued') or '0') > 0 then return {{'exists'}} end
for _ = 1, take_number() do redis.call('SET', KEYS[take_number()], take()) end
for _ = 1, take_number() do redis.call('HSET', LEDGER, take(), take()) end
for _ = 1, take_number() do redis.call('HSET', STATES, take(), take()) end
return {{'done'}}
"""

# A pin is "expiry version version ...". Pins and retirements are decided in one place, Redis, so a
# version is either declared in use or deleted, never both.
PIN_VERSIONS = f"""
{_TAKE}
local PINS, RETIRED = KEYS[1], KEYS[2]
local reader, ttl_ms, versions = take(), take_number(), {{}}
for index = 1, take_number() do
    versions[index] = take()
    if redis.call('SISMEMBER', RETIRED, versions[index]) == 1 then return 0 end
end
local time = redis.call('TIME')
local expires_at_ms = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000) + ttl_ms)
redis.call('HSET', PINS, reader, expires_at_ms .. ' ' .. table.concat(versions, ' '))
return 1
"""

RETIRE_VERSIONS = f"""
{_TAKE}
{_ROLES}
local PINS, RETIRED = KEYS[1], KEYS[2]
local versions, is_wanted = {{}}, {{}}
for index = 1, take_number() do
    versions[index] = take()
    is_wanted[versions[index]] = true
end
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local pins, expired = redis.call('HGETALL', PINS), {{}}
for index = 1, #pins, 2 do
    local expires_at_ms, pinned = string.match(pins[index + 1], '^(%d+) (.*)$')
    if tonumber(expires_at_ms) <= now_ms then
        expired[#expired + 1] = pins[index]
    else
        for version in string.gmatch(pinned, '%S+') do
            if is_wanted[version] then return {{'in use', pins[index]}} end
        end
    end
end
for _, version in ipairs(versions) do redis.call('SADD', RETIRED, version) end
for _, reader in ipairs(expired) do redis.call('HDEL', PINS, reader) end
return {{'done'}}
"""

# A script instead of MULTI: Redis refuses even the reads of a transaction while it is full.
READ_TOGETHER = f"""
{_TAKE}
{_ROLES}
local replies = {{'done'}}
for index = 1, take_number() do replies[index + 1] = redis.call(take(), KEYS[take_number()]) end
return replies
"""
"""The replies to commands of one key each, as of one moment."""

# Redis before 7.0 does not report a consumer group's lag. Counting by pages keeps the server's copy
# small; the stream is bounded.
COUNT_AFTER = """
local start, count = '(' .. ARGV[1], 0
while true do
    local page = redis.call('XRANGE', KEYS[1], start, '+', 'COUNT', 256)
    count = count + #page
    if #page < 256 then return count end
    start = '(' .. page[#page][1]
end
"""
